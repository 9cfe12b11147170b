"""Linear attention: feature maps, decays, gates, delta rules, recurrences, state-space scans."""
