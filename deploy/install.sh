#!/bin/sh
# Installs this project into the image's environment: install.sh EXTRAS [INDEX OF TORCH]
# Then it removes all that only an installation needs.
set -eu
pip() { /opt/glm4/bin/pip --no-cache-dir --disable-pip-version-check "$@"; }

if [ -n "${2:-}" ]; then
  pip install --constraint constraints.txt --index-url "$2" torch
fi
pip install --constraint constraints.txt ".[$1]"
pip uninstall --quiet --yes setuptools pip
