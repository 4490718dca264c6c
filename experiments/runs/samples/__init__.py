"""A deployment of any module on any samples: settings, the model, how it is judged, what is written down."""
