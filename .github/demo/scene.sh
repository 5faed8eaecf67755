#!/usr/bin/env bash
# What the GIF in README shows: commands that are typed and run here, and nothing that is not real.  record.sh runs it.
set -euo pipefail

CHAT='{"model":"demo","messages":[{"role":"user","content":"hi"}]}'

# Shows a command as if it were typed, and runs it.
run() {
  local at
  printf '\033[1;32m$\033[0m '
  for ((at = 0; at < ${#1}; at++)); do
    printf '%s' "${1:at:1}"
    sleep 0.008
  done
  printf '\n'
  eval "$1"
  sleep "${2:-1}"
}

run 'python3 gateway.py --demo &' 1.8
printf '\n'
run 'curl --cacert cert.pem https://localhost:8443/api/tags -w " [%{http_code}]\n"' 0.9
run 'curl -sN --cacert cert.pem https://localhost:8443/api/chat -H "X-Api-Key: $KEY" -d "$CHAT" | jq -j --unbuffered .message.content' 0.4
printf '\n'
run 'tail -n 1 gateway.log | jq -c "{key,path,prompt_tokens,response_tokens,status,duration_ms}"' 1.4
run 'curl --cacert cert.pem https://localhost:8443/api/pull -H "X-Api-Key: $KEY" -d "{}" -w " [%{http_code}]\n"' 0.4
run 'tail -n 1 gateway.log | jq -c "{key,path,status,refused}"' 1
disown
kill -KILL "$!" # so that what it says at its end is not in the picture
