"""What each reducer costs beside the prefill it saves: `python -m bench.reducers_cost`."""
