"""The host twin: the kernels' own source, compiled by the C++ compiler and run lane by lane."""
