"""What `massl-ray doctor` looks at: this machine, the places a run reads and writes, the images, the model. Imports no Ray."""
