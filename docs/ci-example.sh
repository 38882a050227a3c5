#!/usr/bin/env bash
# Export in CI: the script of docs/ci.md, which our own CI runs as it stands.
#
#   docs/ci-example.sh CHECKPOINT BUNDLE
#
# Makes BUNDLE from CHECKPOINT unless it is there already for the same key, and leaves BUNDLE/report.json as
# the artefact. Exits with glm4-deploy's own status: 1 refused, 2 wrong usage, 3 the accuracy gate failed.
set -euo pipefail
checkpoint=${1:?usage: ci-example.sh CHECKPOINT BUNDLE}
bundle=${2:?usage: ci-example.sh CHECKPOINT BUNDLE}
options=(--target ort --precision "${PRECISION:-int8}")

# In a checkout of this project "make demo" has installed it; elsewhere install a wheel of it
# with the extras cpu and export (README.md).
PATH=$PWD/.venv/bin:$PATH
glm4-deploy doctor

# The key names everything that decides the bundle's bytes; use it as your CI cache's key.
key=$(glm4-deploy export "$checkpoint" "${options[@]}" --print-key)
echo "cache key: $key"
if [[ -f $bundle/manifest.json && -f $bundle.key && $(<"$bundle.key") == "$key" ]]; then
    echo "unchanged: $bundle is up to date"
    exit 0
fi

status=0
glm4-deploy export "$checkpoint" "$bundle" "${options[@]}" --force || status=$?
case $status in
    0) echo "$key" >"$bundle.key" ;;
    1) echo "refused: see the line above" ;;
    2) echo "wrong usage: see the line above" ;;
    3) echo "the bundle does not compute what the checkpoint does: do not ship it" ;;
esac
[[ $status -eq 0 ]] || exit "$status"

glm4-deploy inspect "$bundle" --json >"$bundle.inspect.json"
echo "artefacts: $bundle/report.json $bundle.inspect.json"
