"""The KGW watermark: green lists that generation favours and that a detector counts."""

from trtllm_contrib_kgw.detector import Detection, detect

__all__ = ["Detection", "detect"]
