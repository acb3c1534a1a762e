"""From the configuration to the parts, from a run folder to its trained model, from that to an exported folder."""
