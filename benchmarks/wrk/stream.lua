wrk.method="POST"; wrk.body='{"model":"sim","prompt":"Hello","max_tokens":16,"stream":true}'; wrk.headers["Content-Type"]="application/json"
