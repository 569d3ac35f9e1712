// Package registry finds an image in an OCI registry and reads ranges of its
// blobs over HTTP.
//
//	ParseReference   what the user typed  → Reference{Host, Repository, Tag, Digest}
//	Client.Resolve   Reference + platform → Image (index, manifest, layers)
//	Image.ErofsLayer Image + selection    → the layer to mount
//	Client.Blob      layer                → Blob: Size, Fetch
//
// A Blob is the lowest reader of the program: one Fetch is one ranged GET whose
// answer is checked (status 206, Content-Range, body length, no encoding) and
// whose body heals itself when the connection breaks. Nothing is cached here;
// what Fetch delivers has been checked for place and length, not for content:
// the digest of a blob cannot be verified from a part of it. What else the manifest
// vouches for parts by, Image.Vouched says; who finds them wrong asks FetchElsewhere.
//
// # The way of a request
//
//	Fetch, manifest    retry (patience)  one loop for opening and for resuming
//	  authTransport    Authorization for this repository; answers 401 once
//	    redirect       follows 3xx; credentials stay with their origin
//	      gate         a circuit breaker for each host, a limit for all
//	        wire       no-progress timeout, redaction, the end of the Client
//	          net/http
//
// Retrying is above everything else, since a try that starts at the registry
// gets a new token and a new signed URL where the old ones were the trouble.
//
// A host that fails gets four requests a second at most, however many want
// something of it, and so does one of which nothing is known yet. The others wait
// in their retry, and all of them go on with its first good answer.
//
// # Time
//
// A caller waits for Options.ErrorWait at most between two bytes of progress,
// and for Options.ResolveWait while an image is resolved; then it gets an
// *UnavailableError. Inside that time a silent connection is given up after
// Options.NoProgress and tried anew.
//
// # Credentials
//
// They come from Options, else from EROFS_OCI_USERNAME and EROFS_OCI_PASSWORD,
// else from the files and helpers of docker login and podman login; without any,
// requests are anonymous. They are sent to the registry's own origin and to the
// token service that it names, never along with a redirect to another origin,
// and over plain HTTP only to a loopback address or with Options.PlainHTTP.
// No error and no log line contains a password, a token or the query of a URL.
//
// # Plain HTTP
//
// HTTPS is spoken, except with Options.PlainHTTP, and except to a loopback host
// (localhost, 127.0.0.0/8, ::1) which answers the TLS greeting with something
// that is not TLS: that one is spoken to in plain HTTP from then on.
//
// The package does not read credentials stored under docker's "credsStore" key,
// registries.conf mirrors or certs.d directories, does not write to registries,
// and knows nothing of what is in a blob.
package registry
