"""`sft-dist doctor`: what is wrong with this machine before a run meets it, each finding with its mend."""
