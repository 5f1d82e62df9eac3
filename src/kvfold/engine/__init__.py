"""The engine room: requests, scheduler, runner, sampler and the step loop that turns prompts into tokens."""
