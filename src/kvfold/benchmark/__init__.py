"""A load generator for OpenAI-compatible servers: `kvfold bench serve`.

    trace or arrivals + lengths -> Workload (prompts of known length, each with its time)
        -> offer_load (sends them, streams the answers) -> Outcome per request
        -> summarize -> Summary -> table, JSON, plot

It knows the server by its HTTP interface alone, so it measures any server and imports nothing of the engine.
"""
