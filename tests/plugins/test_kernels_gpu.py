"""The kernel on a GPU: the cases of ``make gpu-check`` at small size, and the torch operator. Needs CUDA."""

import pytest
import torch
from attention_cases import random_case

import glm4_plugins.torch  # noqa: F401  registers the torch operator
from benchmarks.gpu_check.correctness import Case, cases, check
from glm4_plugins.torch_kernel import device_choices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("case", list(cases(100)), ids=str)
def test_against_float64(case: Case):
    for tiles in device_choices(torch.device("cuda")):
        result = check(case, tiles, "cuda")
        assert result["ok"], result


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_torch_operator_agrees_with_the_cpu(dtype):
    case, attributes = random_case(1, 2, 40, 2, 16, 128, 64, [70, 3], [40, 11])
    tensors = {n: torch.from_numpy(a).to(dtype if a.dtype.kind == "f" else None) for n, a in case.items()}
    operator = torch.ops.glm4.partial_rope_gqa_attention
    expected = operator(**tensors, **vars(attributes))[0]
    actual = operator(**{n: t.cuda() for n, t in tensors.items()}, **vars(attributes))[0].cpu()
    torch.testing.assert_close(actual, expected, atol=3e-3, rtol=0)
