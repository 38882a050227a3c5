#!/usr/bin/env bash
# Export and validate in CI: the step of docs/ci.md. The GitHub action, the GitLab template and our own CI run it.
#
#   docs/ci/export-and-validate.sh CHECKPOINT BUNDLE
#
# Environment: TARGET (ort), PRECISION (int8), GATE (default), KEY (quick, or content for files that are downloaded anew).
# Makes BUNDLE unless it exists for the same key. Beside it: BUNDLE.key, BUNDLE.inspect.json, BUNDLE.junit.xml.
# Exits with glm4-deploy's own status: 1 refused, 2 wrong usage, 3 a gate failed.
set -euo pipefail
checkpoint=${1:?usage: export-and-validate.sh CHECKPOINT BUNDLE}
bundle=${2:?usage: export-and-validate.sh CHECKPOINT BUNDLE}
options=(--target "${TARGET:-ort}" --precision "${PRECISION:-int8}")

# A checkout of this project has it in .venv after "make demo". Elsewhere, install it with the extras cpu and export.
PATH=$PWD/.venv/bin:$PATH
glm4-deploy doctor

# The key names everything that decides the bundle's bytes.
key=$(glm4-deploy export "$checkpoint" "${options[@]}" --print-key --key "${KEY:-quick}")
echo "cache key: $key"
if [[ -f $bundle/manifest.json && -f $bundle.key && $(<"$bundle.key") == "$key" ]]; then
    echo "unchanged: $bundle is up to date"
else
    status=0
    glm4-deploy export "$checkpoint" "$bundle" "${options[@]}" --force || status=$?
    case $status in
        0) echo "$key" >"$bundle.key" ;;
        1) echo "refused: see the line above" ;;
        2) echo "wrong usage: see the line above" ;;
        3) echo "the bundle does not compute what the checkpoint does: do not ship it" ;;
    esac
    [[ $status -eq 0 ]] || exit "$status"
fi

glm4-deploy inspect "$bundle" --json >"$bundle.inspect.json"
glm4-deploy validate "$bundle" --reference "$checkpoint" --gate "${GATE:-default}" --junit "$bundle.junit.xml"
echo "artefacts: $bundle/report.json $bundle.inspect.json $bundle.junit.xml"
