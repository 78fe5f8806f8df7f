package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/workspace"
)

// maxPage is the largest page.
const maxPage = 1000

// order is how a list is paged: by keys, which no two of its elements share
// and which sort as the list does. A client may also name an element.
type order[T any] struct {
	path string
	key  func(T) string
	name func(T) string // nil: the key
	// stale says that after is the name of an element that is gone, and no key.
	stale func(after string) bool
}

func sandboxOrder() order[sandbox.Info] {
	const digits = 20
	return order[sandbox.Info]{
		path: "/v1/sandboxes",
		key:  func(i sandbox.Info) string { return fmt.Sprintf("%0*d.%s", digits, i.CreatedAt.UnixNano(), i.ID) },
		name: func(i sandbox.Info) string { return i.ID },
		stale: func(after string) bool {
			number, _, ok := strings.Cut(after, ".")
			return !ok || len(number) != digits || strings.Trim(number, "0123456789") != ""
		},
	}
}

func snapshotOrder() order[snapshot.Snapshot] {
	return order[snapshot.Snapshot]{path: "/v1/snapshots", key: func(s snapshot.Snapshot) string { return s.Tag }}
}

func imageOrder() order[image.Image] {
	return order[image.Image]{path: "/v1/images", key: func(i image.Image) string { return i.Name }}
}

func workspaceOrder() order[workspace.Workspace] {
	return order[workspace.Workspace]{path: "/v1/workspaces", key: func(w workspace.Workspace) string { return w.Name }}
}

// cut returns the part of all that is asked for, and where the next begins:
// "" where there is none. Who asks for no page gets all, as it is.
func (o order[T]) cut(all []T, limit *int, after string) (part []T, next string, err error) {
	if limit == nil && after == "" {
		return all, "", nil
	}
	if limit != nil && (*limit < 1 || *limit > maxPage) {
		return nil, "", fmt.Errorf("%w: limit must be 1 to %d", errdef.ErrInvalid, maxPage)
	}
	if after, err = o.resolve(all, after); err != nil {
		return nil, "", err
	}
	var rest []keyed[T]
	for _, item := range all {
		if key := o.key(item); key > after {
			rest = append(rest, keyed[T]{key, item})
		}
	}
	slices.SortFunc(rest, func(a, b keyed[T]) int { return cmp.Compare(a.key, b.key) })
	if limit != nil && len(rest) > *limit {
		rest = rest[:*limit]
		next = rest[*limit-1].key
	}
	for _, k := range rest {
		part = append(part, k.item)
	}
	return part, next, nil
}

// keyed is an element with its key, which takes longer to make than to compare.
type keyed[T any] struct {
	key  string
	item T
}

// resolve turns the name of an element into its key.
func (o order[T]) resolve(all []T, after string) (string, error) {
	if o.name == nil || after == "" {
		return after, nil
	}
	if i := slices.IndexFunc(all, func(item T) bool { return o.name(item) == after }); i >= 0 {
		return o.key(all[i]), nil
	}
	if o.stale(after) {
		return "", errdef.WithHint(fmt.Errorf("%w: after: there is no %q", errdef.ErrInvalid, after), "send the X-Next-After of the page before")
	}
	return after, nil
}

// page is an answer with a part of a list.
type page[T any] struct {
	items []T
	path  string
	limit *int
	next  string
}

// VisitListSandboxesResponse makes page an answer to listSandboxes.
func (p page[T]) VisitListSandboxesResponse(w http.ResponseWriter) error { return p.visit(w) }

// VisitListSnapshotsResponse makes page an answer to listSnapshots.
func (p page[T]) VisitListSnapshotsResponse(w http.ResponseWriter) error { return p.visit(w) }

// VisitListImagesResponse makes page an answer to listImages.
func (p page[T]) VisitListImagesResponse(w http.ResponseWriter) error { return p.visit(w) }

// VisitListWorkspacesResponse makes page an answer to listWorkspaces.
func (p page[T]) VisitListWorkspacesResponse(w http.ResponseWriter) error { return p.visit(w) }

// VisitListBlocksResponse makes page an answer to listBlocks.
func (p page[T]) VisitListBlocksResponse(w http.ResponseWriter) error { return p.visit(w) }

func (p page[T]) visit(w http.ResponseWriter) error {
	body, err := json.Marshal(list(p.items))
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	if p.next != "" {
		query := url.Values{"after": {p.next}, "limit": {strconv.Itoa(*p.limit)}} // there is no next page without a limit
		h.Set("X-Next-After", p.next)
		h.Set("Link", "<"+p.path+"?"+query.Encode()+`>; rel="next"`)
	}
	_, err = w.Write(append(body, '\n'))
	return err
}
