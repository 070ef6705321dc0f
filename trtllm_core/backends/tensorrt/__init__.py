"""TensorRT (data-center GPUs) and TensorRT-RTX: one implementation over either module, which is passed as ``trt``."""
