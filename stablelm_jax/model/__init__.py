"""The mathematics of the model: arrays and logical axis names, no mesh, no file, no flag."""
