#!/usr/bin/env bash
# Prints the first Python 3.12 (else a newer one) of this machine. PYTHON=... names one by hand.
set -u

suits() { # a command or path, and the least and greatest minor version of Python 3
  "$1" -c "import sys; sys.exit(not ((3, $2) <= sys.version_info[:2] <= (3, $3)))" >/dev/null 2>&1
}

show() { # a command; of a virtual environment, which may be the one to be made anew, what it is made of
  "$1" -c "import sys; sys.exit(sys.prefix == sys.base_prefix or print(sys._base_executable))" && return
  command -v "$1"
}

if [ -n "${PYTHON:-}" ]; then
  suits "$PYTHON" 12 99 && { show "$PYTHON"; exit 0; }
  echo "error: PYTHON=$PYTHON is not a Python 3.12 or newer" >&2
  exit 1
fi

candidates=(python3.12 python3 python)
# Version managers and common places that need not be on PATH.
shopt -s nullglob
candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python)
candidates+=("${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-3.12*/bin/python3.12)
candidates+=("$HOME"/.asdf/installs/python/3.12*/bin/python "$HOME"/.local/share/mise/installs/python/3.12*/bin/python)
candidates+=(/usr/local/bin/python3.12 /opt/homebrew/bin/python3.12 /opt/python/3.12*/bin/python3.12)

for python in "${candidates[@]}"; do
  suits "$python" 12 12 && { show "$python"; exit 0; }
done
for python in python3.13 python3.14 python3 python; do
  suits "$python" 13 99 && { show "$python"; exit 0; }
done

found=""
for python in python3 python; do
  version=$("$python" --version 2>/dev/null) && found="$found $python is ${version#Python };"
done
echo "error: no Python 3.12 or newer found.${found:+ Found:$found} Install Python 3.12, or name one: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
