"""The HTTP service: ``idgen serve``. It speaks the OpenAI Images API and one of its own, over one engine.

``create_app`` in :mod:`idgen.service.app` makes the ASGI application; docs/service.md describes it for its users.
"""
