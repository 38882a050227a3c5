"""Our operators: attention (``glm4::PartialRopeGqaAttention``) and quantized products, with their implementations."""
