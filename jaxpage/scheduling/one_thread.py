"""How to compile a program that is the scheduler and no model, as the simulator is.

Its step is hundreds of operations of about a tenth of a microsecond. XLA's CPU compiler takes a
gather from a large array for much work, whatever it gathers, and splits it over threads, which
takes longer than the gather; and it orders operations so that they could overlap.
"""

ON_ONE_THREAD = {  # for `jax.jit(compiler_options=)`; both speak of the CPU's compiler alone
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
