"""From raw video files to frames, flow, skeletons and annotations; checks and statistics of prepared data."""
