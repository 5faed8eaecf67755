#!/usr/bin/env bash
# Writes gateway.pyz: gateway.py as a program in one file that any Python from 3.9 on can run.
#
#   ./build_zipapp.sh                       needs nothing but Python
#   PYTHON=python3.13 ./build_zipapp.sh     with this one
#
# The same gateway.py gives the same bytes: on every Python, whatever the umask and the file's date.
# The date in the archive is SOURCE_DATE_EPOCH, or else 1980-01-01.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

"${PYTHON:-python3}" - gateway.py gateway.pyz <<'PYTHON'
import hashlib
import io
import os
import sys
import time
import zipfile

source, target = sys.argv[1:]
epoch = max(int(os.environ.get("SOURCE_DATE_EPOCH") or 0), 315532800)  # a zip file knows no date before 1980

entry = zipfile.ZipInfo("__main__.py", time.gmtime(epoch)[:6])  # not `zipapp -m`, which loses the exit status
entry.create_system = 3  # Unix, also where it is built on Windows
entry.external_attr = 0o100644 << 16
entry.compress_type = zipfile.ZIP_STORED  # since not every zlib deflates to the same bytes

with open(source, "rb") as file:
    program = file.read().replace(b"\r\n", b"\n")  # a checkout on Windows may have these
archive = io.BytesIO()
archive.write(b"#!/usr/bin/env python3\n")
with zipfile.ZipFile(archive, "w") as bundle:
    bundle.writestr(entry, program)

content = archive.getvalue()
with open(target, "wb") as file:
    file.write(content)
os.chmod(target, 0o755)
print(f"{target}  {len(content)} bytes  SHA-256 {hashlib.sha256(content).hexdigest()}")
PYTHON
