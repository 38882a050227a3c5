"""Types of the arrays that sessions, samplers and the scheduler exchange."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]  # token ids [tokens]
FloatArray = npt.NDArray[np.float32]
Logits = FloatArray  # [vocabulary] of one position, or [rows, vocabulary]
