package fakeregistry

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
)

// A Plan says what goes wrong with each request; it is what SetFault takes. Plans
// are made of plans:
//
//	r.SetFault(fakeregistry.Always(fakeregistry.Fault{Status: 503}).Every(3).OnBlobs())
//
// refuses every third GET of a blob. Each part sees only what the parts to its right
// let through, so Every counts blobs there.
type Plan func(*http.Request) *Fault

// Always has each request meet f.
func Always(f Fault) Plan { return func(*http.Request) *Fault { return &f } }

// OnBlobs leaves all but GETs of blobs alone.
func (p Plan) OnBlobs() Plan { return p.on("blobs") }

// OnManifests leaves all but GETs of manifests alone.
func (p Plan) OnManifests() Plan { return p.on("manifests") }

func (p Plan) on(what string) Plan {
	return func(req *http.Request) *Fault {
		_, kind, _, _ := splitPath(req.URL.Path)
		if req.Method != http.MethodGet || kind != what {
			return nil
		}
		return p(req)
	}
}

// OnTokens leaves all but requests to the token service alone.
func (p Plan) OnTokens() Plan {
	return func(req *http.Request) *Fault {
		if req.URL.Path != tokenPath {
			return nil
		}
		return p(req)
	}
}

// Authorized leaves requests without an Authorization header alone.
func (p Plan) Authorized() Plan {
	return func(req *http.Request) *Fault {
		if req.Header.Get("Authorization") == "" {
			return nil
		}
		return p(req)
	}
}

// Every has one request of k meet the plan: the kth, the 2kth and so on.
func (p Plan) Every(k int64) Plan {
	seen := new(atomic.Int64)
	return func(req *http.Request) *Fault {
		if seen.Add(1)%k != 0 {
			return nil
		}
		return p(req)
	}
}

// First has only the first n requests meet the plan.
func (p Plan) First(n int64) Plan {
	seen := new(atomic.Int64)
	return func(req *http.Request) *Fault {
		if seen.Add(1) > n {
			return nil
		}
		return p(req)
	}
}

// NoRanges answers as a server does that knows no ranges: with 200 and the whole.
func NoRanges() Plan {
	return func(req *http.Request) *Fault {
		req.Header.Del("Range")
		return &Fault{}
	}
}

// OtherRange gives another range than the one that was asked for, and says so: both
// ends are moved, the first byte by first and the last by last. (0, -1) is a range
// that is too short, (0, 1) one that is too long, (1, 1) one of another place.
func OtherRange(first, last int64) Plan {
	return func(req *http.Request) *Fault {
		var from, to int64
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
			return nil // a request for the whole has no range to get wrong
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", max(from+first, 0), max(to+last, 0)))
		return &Fault{}
	}
}

// ShortBody takes n bytes off the end of the body. The answer says nothing of it,
// but for its Content-Length.
func ShortBody(n int) Fault {
	return Fault{Rewrite: func(status int, _ http.Header, body []byte) (int, []byte) {
		return status, body[:max(len(body)-n, 0)]
	}}
}

// LongBody adds n zeros to the body. The answer says nothing of it, but for its
// Content-Length.
func LongBody(n int) Fault {
	return Fault{Rewrite: func(status int, _ http.Header, body []byte) (int, []byte) {
		return status, append(body, make([]byte, n)...)
	}}
}

// Gzip compresses the body although nobody asked for it, and says so.
func Gzip() Fault {
	return Fault{Rewrite: func(status int, header http.Header, body []byte) (int, []byte) {
		var b bytes.Buffer
		z, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed) // a level that there is
		_, _ = z.Write(body)                            // into memory
		_ = z.Close()
		header.Set("Content-Encoding", "gzip")
		return status, b.Bytes()
	}}
}

// FlipBit flips a bit of the byte at off of the blob or manifest, in every answer
// that has it.
func FlipBit(off int64) Fault {
	return Fault{Rewrite: func(status int, header http.Header, body []byte) (int, []byte) {
		first := int64(0)
		if claim := header.Get("Content-Range"); claim != "" {
			if _, err := fmt.Sscanf(claim, "bytes %d-", &first); err != nil {
				return status, body
			}
		}
		if status < 300 && off >= first && off < first+int64(len(body)) {
			body[off-first] ^= 1 << (off % 8)
		}
		return status, body
	}}
}

// Echo refuses with a status, and with a message and headers that repeat what the
// client sent in confidence.
func Echo(status int) Plan {
	return func(req *http.Request) *Fault {
		secret := req.Header.Get("Authorization") + " " + req.URL.String()
		if _, password, ok := req.BasicAuth(); ok {
			secret += " " + password
		}
		_, bare, _ := strings.Cut(req.Header.Get("Authorization"), " ")
		return &Fault{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Warning", secret)
			refuse(w, status, "ECHO", secret+" "+bare)
		})}
	}
}

// Without takes a header off the answer.
func Without(name string) Fault { return Fault{Header: http.Header{name: {}}} }

// Or has each request meet the fault of p, or else that of q.
func (p Plan) Or(q Plan) Plan {
	return func(req *http.Request) *Fault {
		if f := p(req); f != nil {
			return f
		}
		return q(req)
	}
}
