//! `roundhouse guard`: a small process between the server and one worker that ends the worker when the server is gone.
