"""The name under which a ClientStorage stands in the configuration of a server.

No code: ZConfig's ``%import`` wants a package, and ``%import zeolith.client.upstream``
reads component.xml beside this file. It adds the section ``<upstream>``, which is the
``<zeolith>`` of a client under a name that a server's file does not use for itself.
The keys of both are in keys.xml of zeolith.client.
"""
