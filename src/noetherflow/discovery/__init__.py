"""Finding symmetries: export, gauge inference, certificate, completeness oracle."""

from noetherflow.discovery.find import find_symmetries

__all__ = ["find_symmetries"]
