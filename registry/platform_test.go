package registry

import (
	"runtime"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParsePlatform(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"linux/amd64", "linux/amd64"},
		{"Linux/x86_64/v1", "linux/amd64"},
		{"linux/amd64/v3", "linux/amd64/v3"},
		{"linux/aarch64", "linux/arm64"},
		{"linux/arm64/v8", "linux/arm64"},
		{"linux/arm64/8", "linux/arm64"},
		{"linux/arm", "linux/arm/v7"},
		{"linux/arm/6", "linux/arm/v6"},
		{"linux/armhf", "linux/arm/v7"},
		{"linux/armel", "linux/arm/v6"},
		{"linux/i386", "linux/386"},
		{"macos/arm64", "darwin/arm64"},
	} {
		got, err := parsePlatform(tc.in)
		if err != nil || got.String() != tc.want {
			t.Errorf("%q: got %v, %v; want %v", tc.in, got, err, tc.want)
		}
	}
	if host, err := parsePlatform(""); err != nil || host.os != runtime.GOOS || host.arch != runtime.GOARCH {
		t.Errorf("host: %v, %v", host, err)
	}
	for _, in := range []string{"linux", "linux/", "/amd64", "a/b/c/d", "linux//v7"} {
		if _, err := parsePlatform(in); err == nil || !strings.Contains(err.Error(), in) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestPlatformAccepts(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"linux/amd64", "linux/amd64 linux/386"},
		{"linux/amd64/v3", "linux/amd64/v3 linux/amd64/v2 linux/amd64 linux/386"},
		{"linux/386", "linux/386"},
		{"linux/arm/v7", "linux/arm/v7 linux/arm/v6 linux/arm/v5"},
		{"linux/arm/v5", "linux/arm/v5"},
		{"linux/arm64", "linux/arm64 linux/arm/v8 linux/arm/v7 linux/arm/v6 linux/arm/v5"},
		{"linux/arm64/v8.2", "linux/arm64/v8.2 linux/arm64/v8.1 linux/arm64 linux/arm/v8 linux/arm/v7 linux/arm/v6 linux/arm/v5"},
		{"linux/arm64/v9.1", "linux/arm64/v9.1 linux/arm64/v9 linux/arm64/v8.6 linux/arm64/v8.5 linux/arm64/v8.4 linux/arm64/v8.3 linux/arm64/v8.2 linux/arm64/v8.1 linux/arm64 linux/arm/v8 linux/arm/v7 linux/arm/v6 linux/arm/v5"},
		{"linux/riscv64", "linux/riscv64"},
		{"linux/amd64/vXXX", "linux/amd64/vxxx linux/386"},
		{"linux/amd64/v99999999999", "linux/amd64/v99999999999 linux/386"},
	} {
		p, err := parsePlatform(tc.in)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range p.accepts() {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s:\n got %v\nwant %v", tc.in, strings.Join(got, " "), tc.want)
		}
	}
}

func TestArmVariant(t *testing.T) {
	for in, want := range map[string]string{
		"processor\t: 0\nCPU architecture: 7\n": "v7",
		"CPU architecture: 8\n":                 "v8",
		"CPU architecture: AArch64\n":           "v8",
		"CPU architecture: 6TEJ\n":              "v6",
		"CPU architecture: ?\n":                 "",
		"":                                      "",
	} {
		if got := armVariant(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func entry(platform string, features ...string) ocispec.Descriptor {
	if platform == "" {
		return ocispec.Descriptor{}
	}
	f := strings.Split(platform+"/", "/")
	return ocispec.Descriptor{Platform: &ocispec.Platform{OS: f[0], Architecture: f[1], Variant: f[2], OSFeatures: features}}
}

func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		name    string
		want    string
		entries []ocispec.Descriptor
		chosen  int
	}{
		{"nothing", "linux/amd64", nil, -1},
		{"the only one", "linux/amd64", []ocispec.Descriptor{entry("linux/arm64"), entry("linux/amd64")}, 1},
		{"another system", "linux/amd64", []ocispec.Descriptor{entry("windows/amd64")}, -1},
		{"tar first, erofs preferred", "linux/amd64", []ocispec.Descriptor{entry("linux/amd64"), entry("linux/amd64", "erofs")}, 1},
		{"erofs first", "linux/amd64", []ocispec.Descriptor{entry("linux/amd64", "erofs"), entry("linux/amd64")}, 0},
		{"the first of equals", "linux/amd64", []ocispec.Descriptor{entry("linux/amd64", "erofs"), entry("linux/amd64", "erofs")}, 0},
		{"erofs of a lower variant", "linux/arm/v7", []ocispec.Descriptor{entry("linux/arm/v7"), entry("linux/arm/v6", "erofs")}, 1},
		{"not erofs of another architecture", "linux/amd64", []ocispec.Descriptor{entry("linux/386", "erofs"), entry("linux/amd64")}, 1},
		{"a compatible architecture if need be", "linux/amd64", []ocispec.Descriptor{entry("linux/386"), entry("linux/arm64")}, 0},
		{"the nearest variant", "linux/arm/v7", []ocispec.Descriptor{entry("linux/arm/v5"), entry("linux/arm/v6")}, 1},
		{"no higher variant", "linux/arm/v6", []ocispec.Descriptor{entry("linux/arm/v7")}, -1},
		{"default variant spelled out", "linux/arm64", []ocispec.Descriptor{entry("linux/arm64/v8")}, 0},
		{"attestations do not run anywhere", "linux/amd64", []ocispec.Descriptor{entry("unknown/unknown"), entry("linux/amd64")}, 1},
		{"a single entry without platform", "linux/amd64", []ocispec.Descriptor{entry("")}, 0},
		{"a named one before it", "linux/amd64", []ocispec.Descriptor{entry(""), entry("linux/amd64")}, 1},
		{"two without platform", "linux/amd64", []ocispec.Descriptor{entry(""), entry("")}, -1},
	} {
		p, err := parsePlatform(tc.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := choose(tc.entries, p, PreferErofs); got != tc.chosen {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.chosen)
		}
	}
}

func TestChooseTar(t *testing.T) {
	for _, tc := range []struct {
		name    string
		want    string
		entries []ocispec.Descriptor
		chosen  int
	}{
		{"tar first", "linux/amd64", []ocispec.Descriptor{entry("linux/amd64"), entry("linux/amd64", "erofs")}, 0},
		{"erofs first, tar preferred", "linux/amd64", []ocispec.Descriptor{entry("linux/amd64", "erofs"), entry("linux/amd64")}, 1},
		{"erofs alone", "linux/amd64", []ocispec.Descriptor{entry("linux/arm64"), entry("linux/amd64", "erofs")}, 1},
		{"another feature is none of ours", "windows/amd64", []ocispec.Descriptor{entry("windows/amd64", "win32k"), entry("windows/amd64", "win32k", "erofs")}, 0},
		{"tar of a lower variant", "linux/arm/v7", []ocispec.Descriptor{entry("linux/arm/v7", "erofs"), entry("linux/arm/v6")}, 1},
		{"not tar of another architecture", "linux/amd64", []ocispec.Descriptor{entry("linux/386"), entry("linux/amd64", "erofs")}, 1},
	} {
		p, err := parsePlatform(tc.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := choose(tc.entries, p, PreferTar); got != tc.chosen {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.chosen)
		}
	}
}
