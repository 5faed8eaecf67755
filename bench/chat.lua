-- wrk's part: one small chat as a request, and what came of all of them as one line of JSON.

wrk.method = "POST"
wrk.body = '{"model":"bench","messages":[{"role":"user","content":"Why is the sky blue?"}],"stream":false}'
wrk.headers["Content-Type"] = "application/json"

function done(summary, latency)
  local failed = summary.errors
  local line = '{"requests":%d,"microseconds":%d,"p50":%d,"p99":%d,' ..
    '"errors":{"connect":%d,"read":%d,"write":%d,"time-out":%d,"status above 399":%d}}\n'
  io.write(line:format(summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    failed.connect, failed.read, failed.write, failed.timeout, failed.status))
end
