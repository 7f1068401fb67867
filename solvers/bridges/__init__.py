"""Our samplers inside other people's loops.

    diffusers        SolverScheduler, a scheduler for any pipeline
    k_diffusion      sampler(name), a function for k-diffusion and ComfyUI
    azula            Sampler(denoiser, solver, steps=...)
    flow_matching    ODESolver(velocity_model, solver)

None of these libraries is imported here; ``diffusers`` is when its class is asked for, the others never. The problems of
``sde.problem`` are inputs of torchsde and torchdiffeq as they are and need no bridge.
"""
