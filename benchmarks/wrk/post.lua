wrk.method="POST"; wrk.body='{"model":"sim","prompt":"Hello","max_tokens":16}'; wrk.headers["Content-Type"]="application/json"
