"""From labels to pictures: schedules, the decoding loop, sampling, the pipeline, batches and sample sets."""
