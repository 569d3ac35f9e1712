package tests

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A logged line is one that the program has, at the level that its call says; "" where that is computed.
type logged struct{ level, message string }

// logCalls finds, in the files that are no tests, each line that is logged, and each name of an attribute.
func logCalls(t *testing.T) (lines map[logged]string, names map[string]string) {
	t.Helper()
	lines, names = make(map[logged]string), make(map[string]string)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "tests" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && d.Name() != ".."):
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			at := func(e ast.Expr) string { return set.Position(e.Pos()).String() }
			switch n := n.(type) {
			case *ast.CallExpr:
				fun, ok := n.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				level, args, ok := lineOf(fun, n.Args)
				if message, text := literal(args); ok && text {
					lines[logged{level, message}] = at(n)
					for rest := args[1:]; len(rest) > 1; rest = rest[2:] {
						if name, text := literal(rest); text {
							names[name] = at(rest[0])
						}
					}
				}
				if name, text := literal(n.Args); text && isName(fun.X, "slog") {
					names[name] = at(n)
				}
			case *ast.CompositeLit:
				if isName(n.Type, "line") && len(n.Elts) == 3 {
					if message, text := literal(n.Elts[1:]); text {
						lines[logged{strings.ToLower(strings.TrimPrefix(n.Elts[0].(*ast.SelectorExpr).Sel.Name, "Level")), message}] = at(n)
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines, names
}

// lineOf says of a call whether it may log a line, at which level, and with what, the message first.
func lineOf(fun *ast.SelectorExpr, args []ast.Expr) (level string, rest []ast.Expr, ok bool) {
	switch name := fun.Sel.Name; name {
	case "Debug", "Info", "Warn", "Error":
		return strings.ToLower(name), args, true
	case "Log":
		if len(args) > 2 {
			return "", args[2:], true
		}
	}
	return "", nil, false
}

func isName(e ast.Expr, name string) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == name
}

func literal(args []ast.Expr) (string, bool) {
	if len(args) == 0 {
		return "", false
	}
	lit, ok := args[0].(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// TestLogsAreDocumented: every line that the program logs is in docs/logs.md at its level, and every attribute has one of
// the names there; and what is there is logged.
func TestLogsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/logs.md")
	if err != nil {
		t.Fatal(err)
	}
	levels := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| (debug|info|warn|error|info or warn|debug, info or warn) \\| `([^`]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		levels[row[2]] = row[1]
	}
	var vocabulary []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		vocabulary = append(vocabulary, row[1])
	}
	// A row after an empty line is not of a table any more.
	for _, torn := range regexp.MustCompile("(?m)^\\|.*\n\n\\|.*$").FindAllString(string(doc), -1) {
		t.Errorf("docs/logs.md: an empty line within a table: %q", torn)
	}
	lines, names := logCalls(t)
	if len(lines) < 30 || len(names) < 10 {
		t.Fatalf("only %d lines and %d attributes were found", len(lines), len(names))
	}
	for l, at := range lines {
		switch level, there := levels[l.message]; {
		case !there:
			t.Errorf("%s: %s %q is not in docs/logs.md", at, l.level, l.message)
		case l.level != "" && l.level != level:
			t.Errorf("%s: %q is logged at level %s, and docs/logs.md says %s", at, l.message, l.level, level)
		}
	}
	for message := range levels {
		if !slices.ContainsFunc([]string{"", "debug", "info", "warn", "error"}, func(level string) bool { return lines[logged{level, message}] != "" }) {
			t.Errorf("docs/logs.md has %q, which is not logged", message)
		}
	}
	for name, at := range names {
		if !slices.Contains(vocabulary, name) {
			t.Errorf("%s: the attribute %q is not in docs/logs.md", at, name)
		}
	}
}
