"""The libraries of TUF and DSSE, and the one private name of theirs that is used.

`TrustedMetadataSet` is the client workflow of the specification (section 5) without any I/O. Tested with tuf 6 and 7.
"""

from __future__ import annotations

import sys

# securesystemslib loads the whole of boto3 for a signer that nobody uses here, if it finds it: half a second, 40 MB.
_hidden = "boto3" not in sys.modules
if _hidden:
    sys.modules["boto3"] = None  # type: ignore[assignment]  # documented: the import then fails
try:
    from securesystemslib import dsse as dsse
    from securesystemslib.signer import CryptoSigner as CryptoSigner
    from securesystemslib.signer import Key as Key
    from securesystemslib.signer import Signature as Signature
    from securesystemslib.signer import Signer as Signer
    from securesystemslib.signer import SSlibKey as SSlibKey
    from tuf.api import exceptions as exceptions
    from tuf.api import metadata as metadata
    from tuf.api.serialization.json import JSONSerializer as JSONSerializer
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet as TrustedMetadataSet
    from tuf.ngclient.config import EnvelopeType as EnvelopeType
finally:
    if _hidden:
        del sys.modules["boto3"]
