"""From labels to pictures: schedules, the decode loop, sampling, the pipeline, batches and sample sets."""
