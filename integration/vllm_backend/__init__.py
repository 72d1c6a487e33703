"""vLLM's engine on exec-mp, through vLLM's own interface for executors.

LLM(model, tensor_parallel_size=2, distributed_executor_backend=ExecMpExecutor)  # the class: by its name vLLM knows of no stages

EngineCore -> ExecMpExecutor -> exec_core's collective_rpc ==exec-mp==> VllmWorker -> vLLM's worker
"""
