package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// nth is a fault for the nth request of this method to an upload, from 1.
func nth(method string, n int, f fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
	var mu sync.Mutex
	seen := 0
	return func(q *http.Request) *fakeregistry.Fault {
		if q.Method != method || !strings.Contains(q.URL.Path, "/uploads/") {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if seen++; seen == n {
			return &f
		}
		return nil
	}
}

// each is a fault for every request of this method to an upload.
func each(method string, f fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
	return func(q *http.Request) *fakeregistry.Fault {
		if q.Method == method && strings.Contains(q.URL.Path, "/uploads/") {
			return &f
		}
		return nil
	}
}

// steps are the requests that r has seen, as METHOD STATUS, with the bytes that
// came with them; a token request is T.
func steps(r *fakeregistry.Registry) string {
	var s []string
	for _, q := range r.Requests() {
		step := fmt.Sprintf("%s %d", q.Method, q.Status)
		if q.Path == "/token" {
			step = "T"
		}
		if q.Received > 0 {
			step += fmt.Sprintf(" +%d", q.Received)
		}
		if q.Path != "/v2/" { // the question of HTTPS or HTTP
			s = append(s, step)
		}
	}
	return strings.Join(s, ", ")
}

func describe(data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: registry.MediaTypeErofs, Digest: sum(data), Size: int64(len(data))}
}

// stored is what repository x has of a blob.
func stored(t *testing.T, r *fakeregistry.Registry, c *registry.Client, desc ocispec.Descriptor) []byte {
	t.Helper()
	body, err := c.Repository(parse(t, r.Addr()+"/x:v1")).Blob(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestPutBlob(t *testing.T) {
	const K = 1000
	data := noise(10 * K)
	type options = fakeregistry.Options
	type upload = fakeregistry.Upload
	for _, tc := range []struct {
		name  string
		o     options
		put   registry.PutOptions
		have  string // the repository that has the blob before
		fault func(*http.Request) *fakeregistry.Fault
		steps string
		want  registry.PutResult
	}{
		{"monolithic", options{}, registry.PutOptions{}, "", nil,
			"HEAD 404, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
		{"it is there", options{}, registry.PutOptions{}, "x", nil,
			"HEAD 200", registry.PutResult{Existed: true}},
		{"chunks", options{}, registry.PutOptions{ChunkSize: 4 * K}, "", nil,
			"HEAD 404, POST 202, PATCH 202 +4000, PATCH 202 +4000, PATCH 202 +2000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"one chunk", options{}, registry.PutOptions{ChunkSize: 10 * K}, "", nil,
			"HEAD 404, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
		{"chunks, queries that count", options{Upload: upload{State: true}}, registry.PutOptions{ChunkSize: 4 * K}, "", nil,
			"HEAD 404, POST 202, PATCH 202 +4000, PATCH 202 +4000, PATCH 202 +2000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"absolute locations", options{Upload: upload{Absolute: true, State: true}}, registry.PutOptions{}, "", nil,
			"HEAD 404, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
		{"chunks that are too small", options{Upload: upload{MinChunk: 6 * K}}, registry.PutOptions{ChunkSize: K}, "", nil,
			"HEAD 404, POST 202, PATCH 202 +6000, PATCH 202 +4000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"mounted", options{Upload: upload{Mount: true}}, registry.PutOptions{MountFrom: []string{"y"}}, "y", nil,
			"HEAD 404, POST 201", registry.PutResult{Mounted: true}},
		{"mounted from the second", options{Upload: upload{Mount: true}}, registry.PutOptions{MountFrom: []string{"z", "y", "a"}}, "y", nil,
			"HEAD 404, POST 202, POST 201, DELETE 204", registry.PutResult{Mounted: true}},
		{"mounts are not made", options{}, registry.PutOptions{MountFrom: []string{"z", "y"}}, "y", nil,
			"HEAD 404, POST 202, POST 202, DELETE 204, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
		{"mounts are forbidden", options{}, registry.PutOptions{MountFrom: []string{"y"}}, "y", nth("POST", 1, fakeregistry.Fault{Status: 403}),
			"HEAD 404, POST 403, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
		{"mount from itself", options{Upload: upload{Mount: true}}, registry.PutOptions{MountFrom: []string{"x"}}, "", nil,
			"HEAD 404, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},

		{"PUT breaks", options{}, registry.PutOptions{}, "", nth("PUT", 1, fakeregistry.Fault{BreakUpload: 3 * K}),
			"HEAD 404, POST 202, PUT 0 +3000, GET 204, PATCH 202 +7000, PUT 201", registry.PutResult{}},
		{"PUT breaks, queries that count", options{Upload: upload{State: true}}, registry.PutOptions{}, "", nth("PUT", 1, fakeregistry.Fault{BreakUpload: 3 * K}),
			"HEAD 404, POST 202, PUT 0 +3000, GET 204, PATCH 202 +7000, PUT 201", registry.PutResult{}},
		{"PATCH breaks", options{}, registry.PutOptions{ChunkSize: 4 * K}, "", nth("PATCH", 2, fakeregistry.Fault{BreakUpload: 3 * K}),
			"HEAD 404, POST 202, PATCH 202 +4000, PATCH 0 +3000, GET 204, PATCH 202 +3000, PUT 201", registry.PutResult{}},
		{"PUT breaks, no status", options{Upload: upload{NoStatus: true}}, registry.PutOptions{}, "", nth("PUT", 1, fakeregistry.Fault{BreakUpload: 3 * K}),
			"HEAD 404, POST 202, PUT 0 +3000, GET 405, DELETE 204, HEAD 404, POST 202, PUT 201 +10000", registry.PutResult{}},
		{"500 to a PATCH", options{}, registry.PutOptions{ChunkSize: 4 * K}, "", nth("PATCH", 2, fakeregistry.Fault{Status: 500}),
			"HEAD 404, POST 202, PATCH 202 +4000, PATCH 500, GET 204, PATCH 202 +4000, PATCH 202 +2000, PUT 201", registry.PutResult{}},
		{"the last answer is lost", options{}, registry.PutOptions{}, "", nth("PUT", 1, fakeregistry.Fault{LoseAnswer: true}),
			"HEAD 404, POST 202, PUT 0 +10000, GET 404, DELETE 404, HEAD 200", registry.PutResult{Existed: true, Sent: 10 * K}},
		{"an answer to a PATCH is lost", options{}, registry.PutOptions{ChunkSize: 6 * K}, "", nth("PATCH", 1, fakeregistry.Fault{LoseAnswer: true}),
			"HEAD 404, POST 202, PATCH 0 +6000, GET 204, PATCH 202 +4000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"PATCHes have no Location", options{}, registry.PutOptions{ChunkSize: 6 * K}, "", each("PATCH", fakeregistry.Fault{Header: http.Header{"Location": {}}}),
			"HEAD 404, POST 202, PATCH 202 +6000, PATCH 202 +4000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"PATCHes have no Range", options{}, registry.PutOptions{ChunkSize: 6 * K}, "", each("PATCH", fakeregistry.Fault{Header: http.Header{"Range": {}}}),
			"HEAD 404, POST 202, PATCH 202 +6000, PATCH 202 +4000, PUT 201", registry.PutResult{Sent: 10 * K}},
		{"the upload is gone", options{}, registry.PutOptions{ChunkSize: 6 * K}, "", nth("PATCH", 2, fakeregistry.Fault{Status: 404}),
			"HEAD 404, POST 202, PATCH 202 +6000, PATCH 404, DELETE 204, HEAD 404, POST 202, PATCH 202 +6000, PATCH 202 +4000, PUT 201", registry.PutResult{}},
		{"503 to HEAD and POST", options{}, registry.PutOptions{}, "", nth("POST", 1, fakeregistry.Fault{Status: 503}),
			"HEAD 404, POST 503, POST 202, PUT 201 +10000", registry.PutResult{Sent: 10 * K}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := startRegistry(t, tc.o)
			if tc.have != "" {
				r.PutBlob(tc.have, sum(data), bytes.NewReader(data), int64(len(data)))
			}
			var last int64
			tc.put.Progress = func(n int64) { last = n }
			r.SetFault(tc.fault)
			c := openClient(t, registry.Options{})
			got, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), tc.put)
			if err != nil {
				t.Fatal(err)
			}
			if s := steps(r); s != tc.steps {
				t.Errorf("steps\n%s, want\n%s", s, tc.steps)
			}
			// How much of a body has left when its connection breaks, the kernel
			// decides: at least what came, at most all of it.
			came := r.Stats().UploadBytes
			if tc.want.Sent == 0 && came > 0 {
				if got.Sent < came || got.Sent > 2*int64(len(data)) {
					t.Errorf("sent %d, and %d came", got.Sent, came)
				}
				tc.want.Sent = got.Sent
			}
			if got != tc.want {
				t.Errorf("result %+v, want %+v", got, tc.want)
			}
			if came > 0 && last != int64(len(data)) && !got.Existed {
				t.Errorf("progress ended at %d", last)
			}
			if n := r.OpenUploads(); n != 0 {
				t.Errorf("%d uploads left behind", n)
			}
			if !bytes.Equal(stored(t, r, c, describe(data)), data) {
				t.Error("the registry has other bytes")
			}
		})
	}
}

func TestPutBlobFails(t *testing.T) {
	data := noise(10000)
	other := sum([]byte("other"))
	for _, tc := range []struct {
		name    string
		o       fakeregistry.Options
		put     registry.PutOptions
		content []byte
		fault   func(*http.Request) *fakeregistry.Fault
		want    string
		steps   string
	}{
		{"content that is too short", fakeregistry.Options{}, registry.PutOptions{}, data[:9000], nil,
			"reading what is to be sent at 9000 of 10000: unexpected EOF", ""},
		{"other content", fakeregistry.Options{}, registry.PutOptions{}, append([]byte{data[0] + 1}, data[1:]...), nil,
			"DIGEST_INVALID", "HEAD 404, POST 202, PUT 400 +10000, DELETE 204"},
		{"another digest is stored", fakeregistry.Options{}, registry.PutOptions{}, data,
			each("PUT", fakeregistry.Fault{Header: http.Header{"Docker-Content-Digest": {other.String()}}}),
			"the registry says that it has stored " + other.String(), "HEAD 404, POST 202, PUT 201 +10000"},
		{"no Location", fakeregistry.Options{}, registry.PutOptions{}, data,
			each("POST", fakeregistry.Fault{Header: http.Header{"Location": {}}}), "no Location", "HEAD 404, POST 202"},
		{"too large", fakeregistry.Options{}, registry.PutOptions{}, data,
			each("PUT", fakeregistry.Fault{Status: 413}), "413 Request Entity Too Large", "HEAD 404, POST 202, PUT 413, DELETE 204"},
		{"Location elsewhere in plain text", fakeregistry.Options{TLS: true}, registry.PutOptions{}, data,
			each("POST", fakeregistry.Fault{Header: http.Header{"Location": {"http://127.0.0.1:1/upload?secret=canary"}}}),
			"refused; plain HTTP must be allowed", "HEAD 404, POST 202"},
		{"breaks each time, and cannot go on", fakeregistry.Options{Upload: fakeregistry.Upload{NoStatus: true}}, registry.PutOptions{}, data,
			each("PUT", fakeregistry.Fault{BreakUpload: 5000}), "given up after 5 beginnings", ""},
		{"loses each upload", fakeregistry.Options{}, registry.PutOptions{ChunkSize: 5000}, data,
			nthAndOn("PATCH", fakeregistry.Fault{Status: 404}), "the registry has lost the upload", ""},
		{"takes less each time", fakeregistry.Options{}, registry.PutOptions{ChunkSize: 5000}, data,
			each("PATCH", fakeregistry.Fault{Header: http.Header{"Range": {"0-0"}}}), "given up after 5 beginnings", ""},
		{"has more than was sent", fakeregistry.Options{}, registry.PutOptions{ChunkSize: 5000}, data,
			each("PATCH", fakeregistry.Fault{Header: http.Header{"Range": {"0-9223372036854775807"}}}), "given up after 5 beginnings", ""},
		{"another length is there", fakeregistry.Options{}, registry.PutOptions{}, data, func(q *http.Request) *fakeregistry.Fault {
			f := answer(200, http.Header{"Content-Length": {"3"}}, "")
			return &f
		}, "the registry has it with 3 bytes, not 10000", "HEAD 200"},
		{"mount from nowhere", fakeregistry.Options{}, registry.PutOptions{MountFrom: []string{"../etc"}}, data, nil, `mount from "../etc"`, ""},
		{"chunk size", fakeregistry.Options{}, registry.PutOptions{ChunkSize: -1}, data, nil, "chunk size -1", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := startRegistry(t, tc.o)
			r.SetFault(tc.fault)
			c := openClient(t, registry.Options{RootCAs: r.RootCAs()})
			_, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(tc.content), tc.put)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "canary") {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if s := steps(r); tc.steps != "" && s != tc.steps {
				t.Errorf("steps\n%s, want\n%s", s, tc.steps)
			}
			if n, most := r.Stats().UploadBytes, int64(5*len(data)); n > most {
				t.Errorf("%d bytes came, of %d", n, len(data))
			}
		})
	}
}

// nthAndOn is each, but for the first of each upload.
func nthAndOn(method string, f fakeregistry.Fault) func(*http.Request) *fakeregistry.Fault {
	var mu sync.Mutex
	seen := map[string]bool{}
	return func(q *http.Request) *fakeregistry.Fault {
		if q.Method != method {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if !seen[q.URL.Path] {
			seen[q.URL.Path] = true
			return nil
		}
		return &f
	}
}

// A registry that dies in the middle of a PATCH and comes back has kept what came.
func TestPutBlobRegistryRestarts(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	data := noise(8 << 20)
	c := newClient(t, registry.Options{})
	var once sync.Once
	var err error
	restarted := make(chan struct{})
	put := registry.PutOptions{ChunkSize: 3 << 20, Progress: func(n int64) {
		if n > 4<<20 {
			once.Do(func() {
				go func() {
					defer close(restarted)
					r.Stop()
					err = r.Start()
				}()
			})
		}
	}}
	got, perr := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), put)
	soon(t, restarted, "restart")
	if err != nil || perr != nil {
		t.Fatal(err, perr)
	}
	if n := r.Stats().UploadBytes; n < int64(len(data)) || n > int64(len(data))+3<<20 {
		t.Errorf("%d bytes came, of %d; result %+v", n, len(data), got)
	}
	if !bytes.Equal(stored(t, r, c, describe(data)), data) {
		t.Error("the registry has other bytes")
	}
}

// An upload that is cancelled by its caller is cancelled at the registry.
func TestPutBlobCancelled(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	data := noise(8 << 20)
	c := newClient(t, registry.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	_, err := c.Repository(parse(t, r.Addr()+"/x:v1")).PutBlob(ctx, describe(data), bytes.NewReader(data), registry.PutOptions{
		ChunkSize: 1 << 20, Progress: func(n int64) {
			if calls++; n > 3<<20 {
				cancel()
			}
		},
	})
	before := calls
	if err == nil || ctx.Err() == nil {
		t.Fatal(err)
	}
	if n := r.OpenUploads(); n != 0 {
		t.Errorf("%d uploads left behind", n)
	}
	if calls != before {
		t.Error("progress after the end")
	}
}

func TestPutManifest(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{})
	c := newClient(t, registry.Options{})
	raw := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
	repo := c.Repository(parse(t, r.Addr()+"/x:v1"))
	for _, target := range []string{"v2", "", sum(raw).String()} {
		desc, err := repo.PutManifest(t.Context(), target, ociIndex, raw)
		if err != nil || desc.Digest != sum(raw) || desc.Size != int64(len(raw)) || desc.MediaType != ociIndex {
			t.Errorf("%q: %+v, %v", target, desc, err)
		}
	}
	for _, target := range []string{"v2", sum(raw).String()} {
		doc, err := repo.Manifest(t.Context(), target)
		if err != nil || !bytes.Equal(doc.Raw, raw) || doc.MediaType != ociIndex || doc.Digest != sum(raw) || doc.Size != int64(len(raw)) {
			t.Errorf("%q: %+v, %v", target, doc, err)
		}
	}
	if _, err := repo.Manifest(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "MANIFEST_UNKNOWN") {
		t.Errorf("v1: %v", err)
	}
	for target, want := range map[string]string{
		sum(nil).String(): "asked for " + sum(nil).String(), "-bad": "invalid reference format", "sha256:12": "invalid",
	} {
		if _, err := repo.PutManifest(t.Context(), target, ociIndex, raw); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", target, err)
		}
	}
	tries := 0
	r.SetFault(func(*http.Request) *fakeregistry.Fault {
		if tries++; tries < 3 {
			return &fakeregistry.Fault{Status: 503}
		}
		return &fakeregistry.Fault{Header: http.Header{"Docker-Content-Digest": {sum(nil).String()}}}
	})
	if _, err := repo.PutManifest(t.Context(), "v3", ociIndex, raw); err == nil || tries != 3 || !strings.Contains(err.Error(), "says that it has stored "+sum(nil).String()) {
		t.Errorf("%d tries: %v", tries, err)
	}
}

// A registry that the configuration blocks is not written to, and a mirror never.
func TestPushPlaces(t *testing.T) {
	r, mirror := startRegistry(t, fakeregistry.Options{}), startRegistry(t, fakeregistry.Options{})
	conf := fmt.Sprintf("[[registry]]\nlocation = %q\n[[registry.mirror]]\nlocation = %q\n[[registry]]\nlocation = \"blocked.example\"\nblocked = true\n", r.Addr(), mirror.Addr())
	c := newClient(t, registry.Options{RegistriesConf: writeFile(t, conf)})
	data := noise(1000)
	repo := c.Repository(parse(t, r.Addr()+"/x:v1"))
	if _, err := repo.PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := repo.PutManifest(t.Context(), "v1", ociIndex, []byte(`{"manifests":[]}`)); err != nil {
		t.Error(err)
	}
	if s := mirror.Stats(); s.Requests != 0 || r.Stats().Uploads != 1 || r.Stats().ManifestPUTs != 1 {
		t.Errorf("mirror %+v, registry %+v", s, r.Stats())
	}
	blocked := c.Repository(parse(t, "blocked.example/x:v1"))
	_, err := blocked.PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
	_, merr := blocked.PutManifest(t.Context(), "v1", ociIndex, []byte(`{"manifests":[]}`))
	for _, err := range []error{err, merr} {
		if err == nil || !strings.Contains(err.Error(), "blocked.example is blocked") {
			t.Error(err)
		}
	}
}
