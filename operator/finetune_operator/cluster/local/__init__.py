"""The local adaptor: this machine in place of a cluster, processes in place of pods. Linux only."""
