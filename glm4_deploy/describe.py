"""Makes the manifest of an ONNX bundle, from the plan and the written files."""

from pathlib import Path
from typing import TYPE_CHECKING

from glm4_deploy.plan import CPU_PROVIDER, Plan
from glm4_deploy.tools import tool_versions
from glm4_exporters.cache_types import cache_providers
from glm4_exporters.graph_io import model_info, model_io
from glm4_runtime.bundle import WEIGHTS, Manifest, file_entry

if TYPE_CHECKING:
    import onnx_ir as ir

    from glm4_deploy.calibration import Prepared
    from glm4_exporters.weights import WrittenWeights


def describe(
    plan: Plan, prepared: "Prepared", model: "ir.Model", folder: Path, written: "WrittenWeights"
) -> Manifest:
    """The manifest of the bundle in ``folder``."""
    form, task = plan.form, plan.task
    io = model_io(plan.config, task, plan.graph_cache or form.activations)
    providers = cache_providers(plan.graph_cache, form.target, form.activations)
    names = [stage.weights for stage in plan.stages] or [WEIGHTS]
    weights = dict(zip(names, written.files, strict=True))
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.name not in weights}
    return Manifest(
        task=task,
        target=form.target.name,
        dialect=form.target.dialect,
        precision=form.precision,
        activations=form.activations,
        kv_cache=plan.graph_cache,
        model=model_info(plan.config, task),
        limits=plan.limits,
        opsets=dict(model.opset_imports),
        inputs=io.inputs,
        outputs=io.outputs,
        providers=tuple(name for name in providers if name == CPU_PROVIDER) if plan.stages else providers,
        tensor_precisions=dict(form.groups),
        scaled_bits=dict(prepared.norm_bits),
        tools=tool_versions(),
        config=plan.config.to_dict(),
        source_sha256=written.source_sha256,
        files=files | weights,
        adapters=plan.adapters,
        adapter_slots=plan.slots,
        stages=plan.stages,
        pooling="last-token, L2" if task == "encoder" else None,
    )
