"""The experiments of HCMM."""
