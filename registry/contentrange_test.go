package registry

import (
	"net/http"
	"testing"
	"time"
)

func TestParseContentRange(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want contentRange
		ok   bool
	}{
		{"bytes 0-0/1", contentRange{0, 0, 1}, true},
		{"bytes 100-299/300", contentRange{100, 299, 300}, true},
		{"Bytes 0-9/9223372036854775807", contentRange{0, 9, 1<<63 - 1}, true},
		{"bytes 0-9/*", contentRange{}, false},
		{"bytes */300", contentRange{}, false},
		{"bytes 5-4/300", contentRange{}, false},
		{"bytes 0-300/300", contentRange{}, false},
		{"bytes 0-9/9223372036854775808", contentRange{}, false},
		{"bytes -1-9/300", contentRange{}, false},
		{"bytes +0-9/300", contentRange{}, false},
		{"bytes 0 - 9/300", contentRange{}, false},
		{"bytes=0-9/300", contentRange{}, false},
		{"items 0-9/300", contentRange{}, false},
		{"bytes 0-9", contentRange{}, false},
		{"0-9/300", contentRange{}, false},
		{"", contentRange{}, false},
	} {
		got, err := parseContentRange(tc.in)
		if (err == nil) != tc.ok || tc.ok && got != tc.want {
			t.Errorf("%q: %+v, %v", tc.in, got, err)
		}
	}
}

func TestCheckPartial(t *testing.T) {
	for _, tc := range []struct {
		name             string
		contentRange     string
		length           int64
		encoding         string
		uncompressed, ok bool
	}{
		{"right", "bytes 10-19/100", 10, "", false, true},
		{"length not said", "bytes 10-19/100", -1, "", false, true},
		{"identity said", "bytes 10-19/100", 10, "identity", false, true},
		{"shifted", "bytes 11-20/100", 10, "", false, false},
		{"shorter", "bytes 10-18/100", 9, "", false, false},
		{"longer", "bytes 10-20/100", 11, "", false, false},
		{"another blob", "bytes 10-19/101", 10, "", false, false},
		{"length contradicts", "bytes 10-19/100", 9, "", false, false},
		{"no Content-Range", "", 10, "", false, false},
		{"gzip", "bytes 10-19/100", 10, "gzip", false, false},
		{"unpacked on the way", "bytes 10-19/100", -1, "", true, false},
	} {
		resp := &http.Response{Header: http.Header{}, ContentLength: tc.length, Uncompressed: tc.uncompressed}
		if tc.contentRange != "" {
			resp.Header.Set("Content-Range", tc.contentRange)
		}
		if tc.encoding != "" {
			resp.Header.Set("Content-Encoding", tc.encoding)
		}
		if err := checkPartial(resp, 10, 10, 100); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"1m":                            0,
		"99999999999999999999":          0,
		"4000000000":                    24 * time.Hour,
		"Fri, 02 Jan 2026 03:04:15 GMT": 10 * time.Second,
		"Fri, 02 Jan 2026 03:04:00 GMT": 0,
		"Fri, 02 Jan 2099 03:04:00 GMT": 24 * time.Hour,
	} {
		if got := parseRetryAfter(in, now); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}
