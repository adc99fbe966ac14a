"""What servers said: recorded from a vLLM 0.32.0, and made by hand in the format of older ones."""

from __future__ import annotations

import gzip
from pathlib import Path

_SAMPLES = Path(__file__).parent / "samples"


def recorded(name: str) -> str:
    """A recording."""
    return gzip.decompress((_SAMPLES / f"{name}.gz").read_bytes()).decode()


METRICS = recorded("metrics-0.32.0.txt")
"""Of the bundled model with ``--enable-lora``, after 13 requests and one for an unknown model."""

# Made by hand, from the names and labels that these versions had.
V0_6 = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.72e+09
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",cpu_offload_gb="0",\
enable_prefix_caching="False",gpu_memory_utilization="0.9",is_attention_free="False",\
num_cpu_blocks="2048",num_gpu_blocks="1000",num_gpu_blocks_override="None",\
sliding_window="None",swap_space_bytes="4294967296"} 1.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="llama"} 2.0
# TYPE vllm:num_requests_swapped gauge
vllm:num_requests_swapped{model_name="llama"} 0.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="llama"} 1.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{model_name="llama"} 0.25
# TYPE vllm:cpu_cache_usage_perc gauge
vllm:cpu_cache_usage_perc{model_name="llama"} 0.0
# TYPE vllm:gpu_prefix_cache_hit_rate gauge
vllm:gpu_prefix_cache_hit_rate{model_name="llama"} -1.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{model_name="llama"} 3.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{model_name="llama"} 100.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="llama"} 50.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_sum{model_name="llama"} 0.3
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="llama"} 4.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="llama"} 4.0
vllm:time_to_first_token_seconds_count{model_name="llama"} 4.0
# TYPE vllm:time_per_output_token_seconds histogram
vllm:time_per_output_token_seconds_sum{model_name="llama"} 0.92
vllm:time_per_output_token_seconds_bucket{le="0.025",model_name="llama"} 46.0
vllm:time_per_output_token_seconds_bucket{le="+Inf",model_name="llama"} 46.0
vllm:time_per_output_token_seconds_count{model_name="llama"} 46.0
# TYPE vllm:time_in_queue_requests histogram
vllm:time_in_queue_requests_sum{model_name="llama"} 0.1
vllm:time_in_queue_requests_bucket{le="0.3",model_name="llama"} 4.0
vllm:time_in_queue_requests_bucket{le="+Inf",model_name="llama"} 4.0
vllm:time_in_queue_requests_count{model_name="llama"} 4.0
# TYPE vllm:request_success_total counter
vllm:request_success_total{finished_reason="stop",model_name="llama"} 3.0
vllm:request_success_total{finished_reason="length",model_name="llama"} 1.0
"""
V0_9 = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llama"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="llama"} 0.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{engine="0",model_name="llama"} 0.5
# TYPE vllm:gpu_prefix_cache_queries_total counter
vllm:gpu_prefix_cache_queries_total{engine="0",model_name="llama"} 200.0
# TYPE vllm:gpu_prefix_cache_hits_total counter
vllm:gpu_prefix_cache_hits_total{engine="0",model_name="llama"} 50.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="llama"} 10.0
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="llama"} 2.0
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="llama"} 2.0
vllm:request_queue_time_seconds_count{engine="0",model_name="llama"} 2.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="llama"} 0.2
"""
V0_11 = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llama"} 1.0
vllm:num_requests_running{engine="1",model_name="llama"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.2
vllm:kv_cache_usage_perc{engine="1",model_name="llama"} 0.6
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{engine="0",model_name="llama"} 0.9
vllm:gpu_cache_usage_perc{engine="1",model_name="llama"} 0.9
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="llama"} 10.0
vllm:generation_tokens_total{engine="1",model_name="llama"} 30.0
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="llama"} 1.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.02",model_name="llama"} 4.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="llama"} 4.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="llama"} 0.05
vllm:inter_token_latency_seconds_bucket{engine="1",le="0.01",model_name="llama"} 3.0
vllm:inter_token_latency_seconds_bucket{engine="1",le="0.02",model_name="llama"} 3.0
vllm:inter_token_latency_seconds_bucket{engine="1",le="+Inf",model_name="llama"} 4.0
vllm:inter_token_latency_seconds_sum{engine="1",model_name="llama"} 0.07
# TYPE vllm:time_per_output_token_seconds histogram
vllm:time_per_output_token_seconds_bucket{engine="0",le="+Inf",model_name="llama"} 99.0
vllm:time_per_output_token_seconds_sum{engine="0",model_name="llama"} 99.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="True",engine="0",\
gpu_memory_utilization="0.8",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="True",engine="1",\
gpu_memory_utilization="0.8",num_gpu_blocks="100"} 1.0
"""
