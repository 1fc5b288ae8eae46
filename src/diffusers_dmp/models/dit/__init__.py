"""The plain DiT that DTR and Remix-DiT build on: model, layers, and the layout of Diffusers' own."""
