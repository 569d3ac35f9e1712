// Package registry finds an image in an OCI registry, reads ranges of its blobs
// over HTTP, and pushes images.
//
//	ParseReference   what the user typed  → Reference{Host, Repository, Tag, Digest}
//	Client.Resolve   Reference + platform → Image (index, manifest, layers)
//	Image.ErofsLayer Image + selection    → the layer to mount
//	Client.Blob      layer                → Blob: Size, Fetch
//	Client.Probe     layer                → what the registry and its mirrors do when it is read
//
// Images are also found in files, and written to them:
//
//	Client.Repository  a repository of a registry               Store  Sink
//	OpenLayout         an OCI image layout in a directory       Store  Sink
//	OpenArchive        a layout, or docker save's, in a tar     Store
//	ResolveIn          Store + platform → Image
//
// Repository.Keep makes a Store of a repository that keeps what it reads of images
// beside their layers: what has a digest is asked for once, and offline nothing is.
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
//	upload             retry (patience)  one loop of rounds: see the type upload
//	  authTransport    Authorization for this repository; answers 401
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
// # Observing
//
// Options.Observer is told of each request by the wire stage, which is the one place
// that all of them pass, hops of redirects and requests for tokens included: its counts
// are those of the servers. What a request alone does not tell (that it is a retry, that
// a mirror was left for it) is told where it is decided.
//
// # Pushing
//
// A blob that the repository has is not sent, and one that another repository has
// is mounted where the registry does that. An upload is one PUT, or PATCHes; when
// its connection breaks it goes on where the registry says that it stands, or, with
// a registry that does not say, begins anew, a few times at most. Uploads that are
// given up are cancelled. What the registry says it has stored must be the digest
// that was sent. Nothing is pushed to a mirror.
//
// An upload may lead to another host, by its Location or by a 307 or 308: the bytes
// go there, the registry's credentials do not. Large bodies wait a moment for the
// registry's leave (Expect: 100-continue), so that an expired token costs a round
// trip and not the body.
//
// # Time
//
// A caller waits for Options.ErrorWait at most between two bytes of progress,
// and for Options.ResolveWait while an image is resolved; then it gets an
// *UnavailableError. What it has waited for before, such as another process that
// was to bring the bytes, is a part of that, but for 3 s (see WithWaiting). Inside
// that time a silent connection is given up after Options.NoProgress and tried
// anew. For an upload a byte that leaves is one of progress for the connection,
// however slow; the patience for the registry is renewed by what it acknowledges
// alone.
//
// # Credentials
//
// They come from Options, else from EROFS_OCI_USERNAME and EROFS_OCI_PASSWORD,
// else from the files and helpers (credHelpers, credsStore) of docker login and
// podman login; without any, requests are anonymous. They are sent to the
// registry's own origin and to the token service that it names, never along with a
// redirect to another origin, and over plain HTTP only to a loopback address or
// with Options.PlainHTTP.
// No error and no log line contains a password, a token or the query of a URL.
//
// # Plain HTTP
//
// HTTPS is spoken, except with Options.PlainHTTP, and except to a loopback host
// (localhost, 127.0.0.0/8, ::1) which answers the TLS greeting with something
// that is not TLS: that one is spoken to in plain HTTP from then on.
//
// # The host's configuration
//
// Mirrors, insecure and blocked registries come from containers-registries.conf(5),
// certificates for a host from the certs.d directories that Options.CertDirs names.
// A mirror that fails is left for the next place, and in the end for the registry.
//
// The package has no peer-to-peer transport, does not copy images by itself, does not
// sign or verify signatures (Referrers only lists them), does not delete, does not
// write archives, unpacks no compressed ones, does not maintain the referrers tag that
// stands in for the API when a manifest with a subject is pushed, and knows nothing of
// what is in a blob.
package registry
