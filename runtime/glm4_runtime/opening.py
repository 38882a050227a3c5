"""Everything that is checked of a bundle before a runtime reads its graph or its engine."""

from pathlib import Path

from glm4_runtime.bundle import GRAPH, Manifest, verify_files
from glm4_runtime.bundle.graph_checks import check_graph
from glm4_runtime.errors import BundleError
from glm4_runtime.side_files import check_bundle


def check_opening(folder: Path, manifest: Manifest, *, hashes: bool = False) -> None:
    """Compare the files of a bundle with its manifest, with each other, and with what exports make.

    Args:
        hashes: hash large files whole, too.

    Raises:
        BundleError: naming the first file or value that does not fit.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise BundleError(
            f"the path {str(folder)!r} is not UTF-8 text, as the runtimes need it; rename the folder"
        ) from error
    verify_files(folder, manifest, hashes=hashes)
    check_bundle(folder, manifest)
    if GRAPH in manifest.files or manifest.stages:  # an engine's bundle need not have one
        check_graph(folder, manifest)
