"""TensorRT engines: the two TensorRTs, a user's options, refusals, and the process that builds."""
