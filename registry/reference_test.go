package registry

import (
	"strings"
	"testing"
)

const (
	hex64  = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	hex128 = hex64 + hex64
)

func TestParseReference(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Reference
		text string // canonical form; "" where it is in
	}{
		{"busybox", Reference{"docker.io", "library/busybox", "latest", ""}, "docker.io/library/busybox:latest"},
		{"busybox:1.37", Reference{"docker.io", "library/busybox", "1.37", ""}, "docker.io/library/busybox:1.37"},
		{"me/tool", Reference{"docker.io", "me/tool", "latest", ""}, "docker.io/me/tool:latest"},
		{"index.docker.io/me/tool:x", Reference{"docker.io", "me/tool", "x", ""}, "docker.io/me/tool:x"},
		{"docker.io/busybox:1", Reference{"docker.io", "library/busybox", "1", ""}, "docker.io/library/busybox:1"},
		{"docker://quay.io/a/b/c:v1", Reference{"quay.io", "a/b/c", "v1", ""}, "quay.io/a/b/c:v1"},
		{"quay.io/a:v1", Reference{"quay.io", "a", "v1", ""}, ""},
		{"127.0.0.1:5000/rootfs:v1", Reference{"127.0.0.1:5000", "rootfs", "v1", ""}, ""},
		{"localhost/x", Reference{"localhost", "x", "latest", ""}, "localhost/x:latest"},
		{"localhost:5000/x/y:z", Reference{"localhost:5000", "x/y", "z", ""}, ""},
		{"host/x", Reference{"docker.io", "host/x", "latest", ""}, "docker.io/host/x:latest"},
		{"[::1]:5000/x:v1", Reference{"[::1]:5000", "x", "v1", ""}, ""},
		{"[fe00::2]/x/y:v1", Reference{"[fe00::2]", "x/y", "v1", ""}, ""},
		{"quay.io/a@sha256:" + hex64, Reference{"quay.io", "a", "", "sha256:" + hex64}, ""},
		{"quay.io/a@sha512:" + hex128, Reference{"quay.io", "a", "", "sha512:" + hex128}, ""},
		{"busybox@sha256:" + hex64, Reference{"docker.io", "library/busybox", "", "sha256:" + hex64}, "docker.io/library/busybox@sha256:" + hex64},
		{"quay.io/a:v1@sha256:" + hex64, Reference{"quay.io", "a", "v1", "sha256:" + hex64}, ""},
	} {
		got, err := ParseReference(tc.in)
		if err != nil {
			t.Errorf("%q: %v", tc.in, err)
			continue
		}
		if got != tc.want {
			t.Errorf("%q: got %#v, want %#v", tc.in, got, tc.want)
		}
		text := tc.text
		if text == "" {
			text = tc.in
		}
		if got.String() != text {
			t.Errorf("%q: String is %q, want %q", tc.in, got.String(), text)
		}
		if again, err := ParseReference(got.String()); err != nil || again != got {
			t.Errorf("%q: does not survive String: %#v, %v", tc.in, again, err)
		}
	}
}

func TestParseReferenceErrors(t *testing.T) {
	for _, tc := range []struct{ in, says string }{
		{"", "is empty"},
		{"docker://", "is empty"},
		{"https://quay.io/a", "is a URL; leave the scheme out"},
		{"oci:layout:v1", "invalid reference format"},
		{"Quay.io/A", "must be lowercase"},
		{"quay.io/a:", "invalid reference format"},
		{"quay.io/a b", "invalid reference format"},
		{"quay.io/a@sha256:12", "invalid reference format"},
		{"quay.io/a@sha384:" + hex64[:32] + hex64, "not sha256 or sha512"},
		{"quay.io/a@md5:" + hex64[:32], "unsupported digest algorithm"},
		{"quay.io/a@sha256:" + strings.ToUpper(hex64), "invalid checksum digest format"},
		{"[::1/x", "not an IPv6 address"},
		{"[127.0.0.1]/x", "not an IPv6 address"},
		{"[fe80::1%eth0]/x", "not an IPv6 address"},
		{"[::1]:x/y", "invalid reference format"},
		{"[::1]", "no repository"},
		{hex64, "hexadecimal"},
	} {
		_, err := ParseReference(tc.in)
		if err == nil {
			t.Errorf("%q: accepted", tc.in)
			continue
		}
		if !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), `"`+tc.in+`"`) {
			t.Errorf("%q: error %q does not quote the input or does not say %q", tc.in, err, tc.says)
		}
	}
}

func TestReferenceErrorHidesPassword(t *testing.T) {
	for _, in := range []string{
		"me:s3cretpw@quay.io/a:v1",
		"https://me:s3cretpw@quay.io/a:v1",
		"docker://me:s3cretpw@quay.io/a:v1",
		"https://quay.io/a?token=s3cretpw",
	} {
		_, err := ParseReference(in)
		if err == nil {
			t.Errorf("%q: accepted", in)
		} else if strings.Contains(err.Error(), "s3cretpw") {
			t.Errorf("password in error: %v", err)
		}
	}
}

func TestReferencePutTogetherByHand(t *testing.T) {
	for _, ref := range []Reference{
		{},
		{Host: "quay.io", Repository: "a"},
		{Host: "quay.io", Repository: "../../token", Tag: "x"},
		{Host: "quay.io/x", Repository: "a", Tag: "x"},
		{Host: "quay.io", Repository: "a", Tag: "x/../../y"},
		{Host: "quay.io", Repository: "a?b", Tag: "x"},
	} {
		if err := ref.validate(); err == nil {
			t.Errorf("%#v: accepted", ref)
		}
	}
}

func TestIsLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:5000": true, "127.0.0.1": true, "127.8.9.1:80": true,
		"[::1]:5000": true, "[::1]": true, "::1": true, "[::ffff:127.0.0.1]:1": true,
		"localhost.example.org": false, "127.0.0.1.example.org": false, "10.0.0.1:5000": false,
		"0.0.0.0": false, "[::]": false, "127.1": false, "": false,
	} {
		if got := IsLoopback(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
}
