"""The wide-area network of the ablation, in virtual time: what work costs here, the paper's test-bed made small, replays."""
