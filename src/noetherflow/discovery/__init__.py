"""Finding symmetries: export, gauge inference, certificate, completeness oracle."""

from noetherflow.discovery.certificate import Certificate, CertificateRow
from noetherflow.discovery.certify import certify
from noetherflow.discovery.explain import explain
from noetherflow.discovery.find import find_symmetries
from noetherflow.discovery.oracle import SymmetryCount, count_symmetries

__all__ = [
    "Certificate",
    "CertificateRow",
    "SymmetryCount",
    "certify",
    "count_symmetries",
    "explain",
    "find_symmetries",
]
