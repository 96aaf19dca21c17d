"""Finding symmetries: export, gauge inference, certificate, completeness oracle."""

from noetherflow.discovery.certify import Certificate, CertificateRow, certify
from noetherflow.discovery.find import find_symmetries

__all__ = ["Certificate", "CertificateRow", "certify", "find_symmetries"]
