"""Everything that is checked of a bundle before a runtime reads its graph or its engine."""

from pathlib import Path

from glm4_runtime.bundle import Manifest, StageInfo, verify_files
from glm4_runtime.bundle.graph_checks import check_graph, check_stage_graph
from glm4_runtime.errors import BundleError
from glm4_runtime.side_files import check_bundle


def check_opening(folder: Path, manifest: Manifest, *, hashes: bool = False, stages: bool = True) -> None:
    """Compare the files of a bundle with its manifest, with each other, and with what exports make.

    Args:
        hashes: hash large files whole, too.
        stages: whether this process opens the stages. Otherwise their files may be missing here, and
            :func:`check_stage` checks them where they are opened.

    Raises:
        BundleError: naming the first file or value that does not fit.
    """
    _require_text(folder)
    elsewhere = set() if stages else {name for stage in manifest.stages for name in stage.files}
    verify_files(folder, manifest, hashes=hashes, names=manifest.files.keys() - elsewhere)
    check_bundle(folder, manifest)
    has_graph = any(
        name in manifest.files for name in manifest.graph_files
    )  # an engine's bundle need not have one
    if has_graph and (stages or not manifest.stages):
        check_graph(folder, manifest)


def check_stage(folder: Path, manifest: Manifest, stage: StageInfo, *, hashes: bool = False) -> None:
    """As :func:`check_opening`, for the files of one stage. The other files of the bundle may be missing."""
    _require_text(folder)
    verify_files(folder, manifest, hashes=hashes, names=stage.files & manifest.files.keys())
    if stage.graph in manifest.files:
        check_stage_graph(folder, manifest, stage)


def _require_text(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise BundleError(
            f"the path {str(folder)!r} is not UTF-8 text, as the runtimes need it; rename the folder"
        ) from error
